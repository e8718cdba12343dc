"""The entries of the dataset catalogue."""

from __future__ import annotations

from zepad_mm.data.catalogue import CATALOGUE, CatalogueEntry

# splits of the Hub's "train" for users who need validation images; "train" itself stays complete
HELD_OUT_AND_TUNE = {"held_out": 0.1, "tune": 0.9}
TEST_VALIDATION_TRAIN = {"test": 0.2, "validation": 0.1, "train": 0.7}  # for datasets with one split on the Hub

GTSRB = (
    "speed limit 20 km/h", "speed limit 30 km/h", "speed limit 50 km/h", "speed limit 60 km/h",
    "speed limit 70 km/h", "speed limit 80 km/h", "end of speed limit 80 km/h", "speed limit 100 km/h",
    "speed limit 120 km/h", "no passing", "no passing for vehicles over 3.5 tons",
    "right of way at the next intersection", "priority road", "yield", "stop", "no vehicles",
    "vehicles over 3.5 tons prohibited", "no entry", "general caution", "dangerous curve to the left",
    "dangerous curve to the right", "double curve", "bumpy road", "slippery road", "road narrows on the right",
    "road work", "traffic signals", "pedestrians", "children crossing", "bicycles crossing",
    "beware of ice or snow", "wild animals crossing", "end of all speed and passing limits", "turn right ahead",
    "turn left ahead", "ahead only", "go straight or right", "go straight or left", "keep right", "keep left",
    "roundabout mandatory", "end of no passing", "end of no passing by vehicles over 3.5 tons",
)  # fmt: skip
IMAGENET20 = (
    "goldfish", "bullfrog", "American alligator", "tarantula", "goose", "koala", "king penguin", "Chihuahua",
    "Persian cat", "lion", "brown bear", "ladybug", "monarch", "bison", "African elephant", "convertible",
    "school bus", "banana", "pizza", "sports car",
)  # fmt: skip
TINYIMAGENET80 = (
    "tailed frog", "boa constrictor", "black widow", "centipede", "jellyfish", "snail", "American lobster",
    "black stork", "Yorkshire terrier", "German shepherd", "standard poodle", "tabby", "grasshopper",
    "walking stick", "cockroach", "dragonfly", "sulphur butterfly", "guinea pig", "Arabian camel", "chimpanzee",
    "lesser panda", "abacus", "academic gown", "altar", "apron", "barbershop", "barn", "basketball", "bathtub",
    "beer bottle", "bikini", "brass", "butcher shop", "candle", "cash machine", "chest", "desk", "dining table",
    "fountain", "freight car", "frying pan", "fur coat", "gondola", "iPod", "jinrikisha", "kimono", "lampshade",
    "lifeboat", "magnetic compass", "moving van", "nail", "obelisk", "oboe", "organ", "pole", "police van",
    "poncho", "pop bottle", "sandal", "sock", "space heater", "suspension bridge", "teapot", "triumphal arch",
    "trolleybus", "vestment", "volleyball", "water tower", "wooden spoon", "guacamole", "ice cream",
    "mashed potato", "cauliflower", "orange", "pomegranate", "espresso", "alp", "cliff", "seashore", "acorn",
)  # fmt: skip

CATALOGUE.register("cifar10")(
    CatalogueEntry(
        name="cifar10",
        hub="uoft-cs/cifar10",
        sizes={"train": 50000, "test": 10000},
        class_names=("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
        evidence="the dataset card on the Hub",
        config="plain_text",
        image_column="img",
        shares=HELD_OUT_AND_TUNE,
        digests={
            "held_out": "536c203a1db0c4370481ce1827c2dc725f065d0a7340314dbb2bff4ed34620c6",
            "tune": "d4bbed13c6a4be67e9b3c4db8b19ab3db72faec45cd2d728fb14664a133a2a56",
        },
    )
)
CATALOGUE.register("stl10")(
    CatalogueEntry(
        name="stl10",
        hub="tanganke/stl10",
        sizes={"train": 5000, "test": 8000},
        class_names=("airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck"),
        evidence="the dataset's own description; columns from a copy of it on the Hub",
        shares=HELD_OUT_AND_TUNE,
        digests={
            "held_out": "cf7ae5af40b1646012d2dcf3e31c477d506f79f9b63c7a5e1471b16629a58173",
            "tune": "d20418567ea1a3d9a184c4d565e868c3d813fc0b5350f612b97637ae818986e0",
        },
    )
)
CATALOGUE.register("animals10")(
    CatalogueEntry(
        name="animals10",
        hub="Rapidata/Animals-10",
        sizes={"train": 23554},
        class_names=("butterfly", "cat", "chicken", "cow", "dog", "elephant", "horse", "sheep", "spider", "squirrel"),
        evidence="the dataset card on the Hub; the row order is unverified",
        shares=TEST_VALIDATION_TRAIN,
        digests={
            "test": "afea5a717468bff8d1466e9329fe25e8f8ffea74bd4016c0a6c3a5f5ff6a8756",
            "validation": "80cbc62dcb1433622bdb5893cb26f13da10eafa5153c687e86c0c213e98958c1",
            "train": "5886b8bdfde463c145d9bae6dd3a5ad05366ac1a4876673a84bb79e730b4b7e2",
        },
    )
)
CATALOGUE.register("gtsrb")(
    CatalogueEntry(
        name="gtsrb",
        hub="tanganke/gtsrb",
        sizes={"train": 26640, "test": 12630},
        class_names=GTSRB,
        evidence="the benchmark's classes and test size; Hub columns and train size are unverified",
        shares=HELD_OUT_AND_TUNE,
        digests={
            "held_out": "713d0d59d65ba3a6433ba1b8051bfea41ce028c854fcb547f8dfb615344a1920",
            "tune": "498ebe01a5a6f15fbdd3557ab7ee37b5a896ca4d43cb1b66d89c9a0a459f11bc",
        },
    )
)
CATALOGUE.register("svhn")(
    CatalogueEntry(
        name="svhn",
        hub="ufldl-stanford/svhn",
        sizes={"train": 73257, "test": 26032, "extra": 531131},
        class_names=("0", "1", "2", "3", "4", "5", "6", "7", "8", "9"),
        evidence="the dataset card on the Hub and the dataset's own page",
        config="cropped_digits",
        shares=HELD_OUT_AND_TUNE,
        digests={
            "held_out": "d1af94c8c5dfc96dd3f68fbdd144f82a7c8751bf8992c60e9634aedbd2af2253",
            "tune": "90e44a2fa2d817d79c9b049969114602bd4743e8bb5dfea7c9d963132e520e16",
        },
    )
)
CATALOGUE.register("imagenet20")(
    CatalogueEntry(
        name="imagenet20",
        hub=None,
        sizes={"train": 10000, "test": 1000},
        class_names=IMAGENET20,
        evidence="20 classes of zh-plus/tiny-imagenet under their names, a stand-in for the paper's",
    )
)
CATALOGUE.register("tinyimagenet80")(
    CatalogueEntry(
        name="tinyimagenet80",
        hub=None,
        sizes={"train": 12800, "test": 4000},
        class_names=TINYIMAGENET80,
        evidence="80 other classes of zh-plus/tiny-imagenet, 160 training images each",
    )
)
CATALOGUE.register("pacs")(
    CatalogueEntry(
        name="pacs",
        hub="flwrlabs/pacs",
        sizes={"photo": 1670, "art_painting": 2048, "cartoon": 2344, "sketch": 3929},
        class_names=("dog", "elephant", "giraffe", "guitar", "horse", "house", "person"),
        evidence="the dataset card on the Hub",
        split_column="domain",
    )
)
CATALOGUE.register("clothing")(
    CatalogueEntry(
        name="clothing",
        hub=None,
        sizes={"train": 3068, "validation": 341, "test": 372},
        class_names=("dress", "hat", "longsleeve", "outwear", "pants", "shirt", "shoes", "shorts", "skirt", "t-shirt"),
        evidence="the CC0 photos; those that ship are 'embedded'",
    )
)
