"""Sliding windows, inference in lockstep over ranks, the confusion matrix and pictures of predictions."""
