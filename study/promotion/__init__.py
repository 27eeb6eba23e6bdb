"""From a study's choice to production: evidence, package, registry, the served model."""
