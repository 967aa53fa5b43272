"""The documentation: pages, their generator (`python -m docs.generate`) and the site's settings."""
