"""``python -m internal_policy.cli``."""

from internal_policy.cli.main import main

if __name__ == "__main__":
    main()
