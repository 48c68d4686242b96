"""Reward functions and the verifier of mathematical answers, which training and evaluation share."""
