"""Ways from a plan to a network: fitted directly, fine-tuned, trained."""
