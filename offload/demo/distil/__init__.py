"""How the recipe was made: text, starting point, training, measurement. Needed by nobody who only runs the demo."""
