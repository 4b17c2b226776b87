"""Chat templates that mergekit calls by name, in the formats' own words."""
