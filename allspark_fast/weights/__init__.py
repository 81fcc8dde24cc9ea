"""Files to models and back: names, files, specification, conversion, export, hub."""
