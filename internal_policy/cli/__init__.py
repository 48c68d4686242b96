"""The command line: parse, make a configuration, one call into the package, show the result."""
