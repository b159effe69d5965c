"""What a base model is: how it is found, identified and described."""
