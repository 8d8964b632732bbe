"The page on which results are explored."


def embedded(outputs):
    return ""


def script():
    return ""
