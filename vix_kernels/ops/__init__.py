"""The attentions, one per file: equations, public function and plain PyTorch reference. The other files contain shared code."""
