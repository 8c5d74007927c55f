"""`python -m mono_internvl` is `mono-internvl`, but imports the library first, as Python does with a module's package."""

from mono_internvl_cli import main


if __name__ == "__main__":
    main()
