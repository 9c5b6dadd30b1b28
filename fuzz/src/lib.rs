//! What the fuzz targets share: inputs as rows of choices, a world with keys, and how a diagnostic must look.

pub mod diagnostic;
pub mod input;
#[path = "../../tests/support/persona.rs"]
pub mod recorded;
pub mod scratch;
pub mod world;

pub use input::Input;
pub use scratch::Scratch;
pub use world::World;
