"""python -m jaxcache <command>"""

import sys

from jaxcache.cli import main

sys.exit(main())
