"""Ray: connecting, resources, the stages of the data. The only package here that imports ray."""
