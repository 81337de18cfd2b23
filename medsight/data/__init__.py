"""Data of training and of evaluation alike: layouts on disk, rows of them, checks, splits, groups, wordings.

schema         the two kinds of rows
registry       where data lies (`Source`) and how it is read (`Layout`), found by name; layouts: those shipped
sources        all layouts' rows as one data set, map-style or streamed
records        records of JSON and parquet files; conversations: rows of conversations; pictures: images and masks
picture_labels masks of label maps, polygons and run lengths
volumes        slices of volumes as rows; dataset_json: what two layouts of volumes share
modalities     words for what images are of
splits         what a file's name tells, and what is held out for validation
groups         code groups of modalities and sites; additions: what a model does not know of data
check          what is wrong with data, as a report
guess          which layout data have, and their source entry; packing: any data as parquet shards (shards)
wording        questions and answers about images with masks, with the wordings of templates
"""
