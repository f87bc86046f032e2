"""Text in and out of any model: tokens, their sampling and the loop that makes them."""
