"""How much a visitor may send, and how much of it the server keeps."""

# An uploaded file.
MAX_FILE_SIZE = "10mb"  # in Gradio's words
MAX_PIXELS = 50_000_000
# Larger pictures are shrunk to it, in pixels: no vision tower here sees more.
MAX_SIDE = 2048
# What Pillow decodes by itself: no EPS, which runs Ghostscript.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")

# A message.
MAX_IMAGES = 4
MAX_CHARACTERS = 4_000

# A conversation.
MAX_CONVERSATION_CHARACTERS = 100_000
MAX_CONVERSATION_IMAGES = 16
MAX_CONVERSATION_PIXELS = 200_000_000  # of its different files

# The server.
PICTURES_KEPT = 16  # decoded, of `MAX_SIDE` at most: 200 MB
SECONDS_KEPT = 3600  # that uploads stay on the disk
QUEUE_LENGTH = 256  # events that wait
SESSIONS_KEPT = 64  # pages of which Gradio remembers what they sent last
