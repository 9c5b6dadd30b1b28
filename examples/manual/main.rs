//! Writes the manual pages and the shells' completions into dist/, from the definitions of the command line and from docs/.
//! Run it with `make manual`.

mod markdown;
mod page;
mod pages;

use std::path::Path;
use std::{error, fs};

fn main() -> Result<(), Box<dyn error::Error>> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let files = pages::files(root)?;
    for directory in pages::DIRECTORIES {
        // A command that is gone leaves no page behind.
        let directory = root.join("dist").join(directory);
        if directory.exists() {
            fs::remove_dir_all(&directory)?;
        }
        fs::create_dir_all(&directory)?;
    }
    for (name, text) in files {
        fs::write(root.join("dist").join(name), text)?;
    }
    Ok(())
}
