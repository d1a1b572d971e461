"""What Krylov spaces give from products alone, below all matrices: conjugate gradients, Lanczos, functions of a map."""
