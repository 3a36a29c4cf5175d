"""Suite "ops": single operations, each timed in several forms."""
