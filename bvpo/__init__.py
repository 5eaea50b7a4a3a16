"""Bias-Variance Optimized Preference Optimization for reasoning models (arXiv 2510.05095).

Read `losses`, `moments`, `mixing`, `module`, in this order, and you have the method.
"""

__version__ = "0.1.0"
