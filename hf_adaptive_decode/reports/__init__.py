"""Pages and figures made of plain numbers and texts; knows nothing of models, engines or tasks."""
