"""Files: ours are written whole (`writing`); what one of a stranger may say (`strangers`), and how its texts are shown
(`escapes`); pages and cards made from `page_templates`."""
