"""What is measured of a run beside its losses."""
