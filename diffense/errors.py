"""Everything Diffense raises on purpose.

::

    DiffenseError
    ├── InputError              what the caller handed over cannot be used
    │   ├── TargetError         the ONNX file is no image classifier that can be guarded
    │   ├── ImageError          an image, folder, table or array of images
    │   ├── TooFewImagesError   too few clean images for what was asked
    │   └── OptionError         an option or a combination of options
    ├── BundleError             a guard bundle on disk
    │   ├── TamperedError       a file is missing, changed, or leads out of the bundle
    │   ├── SchemaError         the manifest is newer, unknown or malformed
    │   └── WrongTargetError    the guard was fitted on another classifier
    ├── ExportError             a graph could not be exported
    │   └── ParityError         an exported graph differs from its source
    ├── ServeError              the server could not be started
    ├── BenchError              a measurement could not be made
    └── ClientError             a call to a server
        ├── ServerDownError     nobody answers at that address
        ├── ModelNotReadyError  the server has no such model, or it is not loaded
        ├── BadInputError       the server refused the input
        ├── DeadlineError       no answer within the deadline
        ├── OverloadedError     the server refuses more work for now
        └── ServerError         the server failed on its side

The message says what is wrong, with which file or tensor, and what to do about it.
"""


class DiffenseError(Exception):
    """Base of all errors that Diffense raises on purpose."""


class InputError(DiffenseError):
    """What the caller handed over cannot be used."""


class TargetError(InputError):
    """The ONNX file is no image classifier that can be guarded."""


class ImageError(InputError):
    """An image, or a folder, table or array of images, cannot be read or used."""


class TooFewImagesError(InputError):
    """There are too few clean images for what was asked."""


class OptionError(InputError):
    """An option, or a combination of options, makes no sense."""


class BundleError(DiffenseError):
    """A guard bundle cannot be used."""


class TamperedError(BundleError):
    """A file of the bundle is missing, has other bytes, or its path leads out of the bundle."""


class SchemaError(BundleError):
    """The manifest is newer than this version, has unknown keys, or is malformed."""


class WrongTargetError(BundleError):
    """The guard was fitted on another classifier."""


class ExportError(DiffenseError):
    """A model repository could not be written."""


class ParityError(ExportError):
    """An exported graph differs from its source by more than the tolerance."""


class ServeError(DiffenseError):
    """The server could not be started, or stopped unexpectedly."""


class BenchError(DiffenseError):
    """A measurement could not be made."""


class ClientError(DiffenseError):
    """A call to a server failed; the leaf says whose turn it is."""


class ServerDownError(ClientError):
    """Nobody answers at that address."""


class ModelNotReadyError(ClientError):
    """The server does not have the model, or it is not loaded."""


class BadInputError(ClientError):
    """The server refused the input (dtype, shape, values)."""


class DeadlineError(ClientError):
    """No answer arrived within the deadline."""


class OverloadedError(ClientError):
    """The server refuses more work for now (UNAVAILABLE, 503)."""


class ServerError(ClientError):
    """The server failed on its side."""
