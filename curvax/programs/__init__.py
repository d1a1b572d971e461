"""What a traced program says of a model: all that knows the names of JAX's primitives stands here."""
