"""One attention per file: its equation, the public function and a plain reference."""
