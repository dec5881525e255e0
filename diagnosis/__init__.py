"""Whether a run is normal, as far as its log tells. Needs neither torch nor the run itself."""
