"""What packages of the library share: checks of arguments, autocast, backend, who looks on."""
