"""Files to models and back: files, specification, conversion, export."""
