"""Symmetric linear maps on parameters: the protocol, the curvature matrices, and the quadratic model made of them."""
