"""Between floors 2 and 3: copies of a model that train, what they learn from, and the loop of steps."""
