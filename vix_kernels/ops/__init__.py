"""One attention a file: its equation, the public function, a plain reference."""
