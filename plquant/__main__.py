"""``python -m plquant``."""

from plquant.cli import main

if __name__ == "__main__":
    main()
