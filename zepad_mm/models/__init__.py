"""The defended model: branches, heads, fusion rules, detection scores, and their files."""
