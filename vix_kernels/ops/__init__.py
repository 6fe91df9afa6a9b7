"""The attentions, one per file: the equation, the public function and a reference in plain PyTorch."""
