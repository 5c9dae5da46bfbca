"""Only what a run that asks a real model needs. The lesson, one folder up, never imports it."""
