"""The attentions, one per file. Each file has the equations, the public function and a reference in plain PyTorch."""
