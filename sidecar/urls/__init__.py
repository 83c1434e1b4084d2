"""Pictures by URL, from the public internet only: the fetch, what a URL may look like, where it may lead."""
