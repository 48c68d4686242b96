"""Rewards of responses, which training and evaluation share."""
