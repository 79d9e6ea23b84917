"""What runs, when and where: configuration, plan, run, command line. The only package that imports ray."""
