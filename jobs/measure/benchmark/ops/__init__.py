"""Suite "ops": single operations, each in the forms that it is timed in."""
