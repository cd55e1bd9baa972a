"""One file a consumer of the similarity; each lists its cases for a device."""
