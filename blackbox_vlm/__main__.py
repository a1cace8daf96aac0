"""`python -m blackbox_vlm` is `blackbox-vlm`."""

from blackbox_vlm.cli import main

if __name__ == "__main__":
    main()
