"""Explains an answer: how much each word of the user's text added to it, or took from it."""
