"""One step of AdamW."""
