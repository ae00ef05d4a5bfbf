"""What the cases must take at least, and are predicted to take on an H200; nothing runs."""
