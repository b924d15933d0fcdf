"""How an answer is judged where a line of code is not enough."""
