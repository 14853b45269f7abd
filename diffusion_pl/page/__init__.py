"""A page of HTML in one file: markup, plots, sliders; nothing in it comes from elsewhere."""
