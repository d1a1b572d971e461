"""What is minimised: losses on outputs, terms, the objective, and the curvature point that everything reads."""
