"""The defended model: branches, heads, fusion rules, suspicion scores, and their files."""
